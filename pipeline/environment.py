"""The environment in which training runs: the user's, without what would break Ray, torch or Python under them.

Ray's processes and the workers inherit the driver's environment, so that it is made in one place, for the driver.
"""

import os
import pwd
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.machine import user_name

# Left over from torchrun, an MPI or a batch system's wrapper. Ray Train sets those that count, but only some of them;
# TORCHELASTIC_USE_AGENT_STORE alone has every worker wait for a store that nobody serves.
OF_TORCHRUN = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_RANK", "ROLE_WORLD_SIZE"),
)
# Variable -> why it cannot stay.
HARMFUL = {
    "PYTHONOPTIMIZE": "Ray and torch need their docstrings and assertions",
    "PYTHONINSPECT": "a process that has ended would wait for input",
    "PYTHONIOENCODING": "Ray's processes write UTF-8",
    "RAY_TRAIN_V2_ENABLED": "this program is written for Ray Train V2",
    "RAY_OVERRIDE_RESOURCES": "Ray on this machine has this machine's cores",
}
# Variables that name a file; Ray's workers run in other directories.
FILES = (
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "RAY_AUTH_TOKEN_PATH"),
    *("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
)
KERNELS = "TORCHINDUCTOR_CACHE_DIR"
SQLITE = "sqlite:///"
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
# Ray's longest socket, below RAY_TMPDIR; a process's number has at most seven digits.
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_SOCKET = 107  # bytes of a path in <sys/un.h>, without its closing zero


def restart_interpreter() -> None:
    """Start this command anew where its interpreter runs in a way that is not to be inherited.

    In another encoding than UTF-8 a path would be read wrongly before anything could be done for it; warnings that are
    errors, and a lack of docstrings, would end the libraries' imports.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # of the processes that a command starts, as `index` does
    utf8 = sys.getfilesystemencoding() == "utf-8"
    if not utf8 or sys.flags.optimize or any(word.startswith("error") for word in sys.warnoptions):
        variables = dict(os.environ)
        list(_python(variables))
        os.execve(sys.executable, [sys.executable, *sys.argv], variables)


def leave_out_unusable_kernels(variables: MutableMapping[str, str]) -> str:
    """Leave out a folder for compiled kernels that cannot be used; torch makes it, and fails, also where none are.

    Returns:
        What is worth telling; "" where nothing is.
    """
    if not (given := variables.get(KERNELS)):
        return ""
    folder = variables[KERNELS] = str(Path(given).absolute())
    with suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if _usable(folder):
        return ""
    del variables[KERNELS]
    return f"{KERNELS}={given} is no folder that can be written to; compiled kernels are kept in the temporary one"


def driver_environment(given: Mapping[str, str], *, starts_ray: bool = True) -> tuple[dict[str, str], list[str]]:
    """What the driver's process is to have in place of `given`.

    Args:
        starts_ray: on this machine, for this training.

    Returns:
        The variables, and a line on each change that a user could wonder about.

    Raises:
        UserError: no directory here can hold Ray's sockets.
    """
    variables = dict(given)
    notes = [
        *_python(variables),
        *_leftovers(variables, starts_ray),
        *_temporary(variables, starts_ray),
        *_home(variables, starts_ray),
        *_absolute(variables),
    ]
    return variables, notes


def _python(variables: dict[str, str]) -> Iterator[str]:
    """Of the interpreter and its text."""
    filters = [part for part in variables.get("PYTHONWARNINGS", "").split(",") if part]
    kept = [part for part in filters if not part.strip().startswith("error")]
    if kept != filters:
        yield f"PYTHONWARNINGS={variables['PYTHONWARNINGS']} is left out: Ray's own warnings would end its processes"
        variables["PYTHONWARNINGS"] = ",".join(kept)
    for name in ("PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONIOENCODING"):
        if value := variables.pop(name, ""):
            yield f"{name}={value} is left out: {HARMFUL[name]}"
    variables["PYTHONSAFEPATH"] = "1"  # else a script's or the current directory's random.py goes before Python's own
    variables["PYTHONUTF8"] = "1"
    locale = variables.get("LC_ALL") or variables.get("LC_CTYPE") or variables.get("LANG") or ""
    if "utf8" not in locale.lower().replace("-", ""):
        variables.pop("LC_ALL", None)
        variables["LC_CTYPE"] = "C.UTF-8"  # of what is not Python


def _leftovers(variables: dict[str, str], starts_ray: bool) -> Iterator[str]:
    """Of other programs, and of other ways to use Ray and torch."""
    left_over = [name for name in variables if name in OF_TORCHRUN or name.startswith("TORCHELASTIC_")]
    for name in left_over:
        del variables[name]
    if left_over:
        yield f"{', '.join(sorted(left_over))}: left out, they are torchrun's; Ray gives each worker its own"
    for name in ("RAY_TRAIN_V2_ENABLED", "RAY_OVERRIDE_RESOURCES") if starts_ray else ("RAY_TRAIN_V2_ENABLED",):
        if (value := variables.pop(name, "")) and value.lower() not in ("1", "true"):
            yield f"{name}={value} is left out: {HARMFUL[name]}"
    # A thread of Ray's that outlives its connection is not to join another cluster, or start one.
    variables.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Else Ray looks for `uv run` above this process, and has each worker install the current directory anew.
    variables.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def _temporary(variables: dict[str, str], starts_ray: bool) -> Iterator[str]:
    """A directory for temporary files, and a short one for Ray's sockets."""
    given = {name: variables[name] for name in ("RAY_TMPDIR", "TMPDIR") if variables.get(name)}
    for name, folder in given.items():
        if not _usable(folder):
            del variables[name]
    folders = [*dict.fromkeys([*given.values(), *TEMPORARY])]
    chosen = next((folder for folder in folders if _usable(folder) and _short(folder)), None)
    if chosen is None:
        if starts_ray:
            raise UserError(
                f"TMPDIR={given.get('TMPDIR', '/tmp')}: Ray can keep no sockets there, nor in {', '.join(TEMPORARY)}; "
                f"set RAY_TMPDIR to a directory that you can write to, of at most {MAX_SOCKET - len(SOCKET)} bytes"
            )
        return
    if chosen != folders[0]:
        name, folder = next(iter(given.items()), ("TMPDIR", "/tmp"))
        why = "is too long a path for Ray's sockets" if _usable(folder) else "cannot be written to"
        yield f"{name}={folder} {why}; Ray uses {chosen}"
    variables["RAY_TMPDIR"] = chosen


def _home(variables: dict[str, str], starts_ray: bool) -> Iterator[str]:
    """A home directory, and a name of the user, for libraries that ask for them; caches that can be written."""
    try:
        user_home: str | None = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # in a container, any number may be the user
        user_home = None
        if not any(variables.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            variables["LOGNAME"] = variables["USER"] = user_name()
    given = variables.get("HOME")
    home = given or user_home
    if home is None or not Path(home).is_absolute() or not Path(home).is_dir():
        variables["HOME"] = _private(variables)
        if given:
            yield f"HOME={given} is no directory; caches are kept in {variables['HOME']}"
        return
    variables["HOME"] = home
    if _usable(home):
        return
    # It stays, for what can be read there, such as the login of an object store.
    private = _private(variables)
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME"):
        variables.setdefault(name, private)
    yield f"HOME={home} cannot be written to; caches are kept in {private}"
    token = any(variables.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"))
    if starts_ray and not token and not Path(home, ".ray/auth_token").exists():
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would make one, and write it there


def _absolute(variables: dict[str, str]) -> Iterator[str]:
    """Paths that hold in every directory."""
    current = Path.cwd()
    for name in FILES:
        if variables.get(name):
            variables[name] = str(current / variables[name])
    if (uri := variables.get("MLFLOW_TRACKING_URI", "")).startswith(SQLITE):
        variables["MLFLOW_TRACKING_URI"] = f"{SQLITE}{current / uri.removeprefix(SQLITE)}"
    if "PYTHONPATH" in variables:
        # An empty entry is the current directory, mostly by accident: PYTHONPATH=$PYTHONPATH:/mine.
        keeps_empty = Path(__file__).parent.parent == current
        entries = variables["PYTHONPATH"].split(os.pathsep)
        variables["PYTHONPATH"] = os.pathsep.join(str(current / entry) for entry in entries if entry or keeps_empty)
    yield from ()


def _private(variables: Mapping[str, str]) -> str:
    """A directory of this user alone, the same each time."""
    top = next((p for p in (variables.get("TMPDIR"), *TEMPORARY) if p and _usable(p)), tempfile.gettempdir())
    folder = Path(top, f"pipeline-{user_name()}", "home")
    with suppress(OSError):  # someone else was there first
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                raise PermissionError(path)
            path.chmod(0o700)
        if _usable(str(folder)):
            return str(folder)
    return tempfile.mkdtemp(prefix="pipeline-home-", dir=top)


def _usable(folder: str) -> bool:
    try:
        return Path(folder).is_absolute() and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # a parent that may not be searched, a name that is too long, a mount that fails
        return False


def _short(folder: str) -> bool:
    return len(os.fsencode(folder + SOCKET)) <= MAX_SOCKET
