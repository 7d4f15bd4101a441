#!/usr/bin/env bash
# The MLflow server of a team: with login, and artifacts that go through the server, so that clients need its address and a login only.
#
#   MLFLOW_FOLDER                    where artifacts go, and the databases where there is no Postgres
#   MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD   the first user, made once; at least 12 characters
#   MLFLOW_FLASK_SERVER_SECRET_KEY   signs the forms of the web pages; the same at each start
#   MLFLOW_SERVER_ALLOWED_HOSTS      the names that clients call it by, such as mlflow:5000,localhost:*
#   POSTGRES_HOST                    unless SQLite will do; with POSTGRES_USER, POSTGRES_DB, PGPASSWORD
#   MLFLOW_HOST, MLFLOW_PORT         where it listens: 0.0.0.0, 5000
#
# Passwords come and stay in the environment: none is on a command line, in an address, or in a file.
set -euo pipefail

for name in MLFLOW_FOLDER MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
    if [ -z "${!name:-}" ]; then
        echo "mlflow_server.sh: $name is not set; the first lines of this script say what it is" >&2
        exit 2
    fi
done

if [ ${#MLFLOW_AUTH_ADMIN_PASSWORD} -lt 12 ]; then
    echo "mlflow_server.sh: MLFLOW_AUTH_ADMIN_PASSWORD is too short; MLflow asks for at least 12 characters" >&2
    exit 2
fi

if [ -n "${POSTGRES_HOST:-}" ]; then
    runs="postgresql+psycopg2://${POSTGRES_USER:-mlflow}@$POSTGRES_HOST:${POSTGRES_PORT:-5432}/${POSTGRES_DB:-mlflow}"
    users=$runs # MLflow keeps the two apart by their tables
else
    runs="sqlite:///$MLFLOW_FOLDER/mlflow.db"
    users="sqlite:///$MLFLOW_FOLDER/users.db"
fi

# Who has a login may see all runs, and change those of experiments that are theirs, or were given to them.
settings=$(mktemp)
cat >"$settings" <<END
[mlflow]
default_permission = READ
database_uri = $users
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END

export MLFLOW_AUTH_CONFIG_PATH=$settings
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # 10 processes more, for judging language models
exec mlflow server --app-name basic-auth --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers 2 \
    --backend-store-uri "$runs" --serve-artifacts --artifacts-destination "$MLFLOW_FOLDER/artifacts"
