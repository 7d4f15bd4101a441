# One image for Ray's head, its workers, who submits jobs, and the MLflow server.
#
#   docker build --tag pipeline:0.2.0 .          or: buildah bud --layers --tag pipeline:0.2.0 .
#
# CPU only, gigabytes smaller: --build-arg TORCH_INDEX=URL, with the address of PyTorch's index of CPU wheels, which the
# install page of pytorch.org names. A package index of your own: --secret id=pip,src=pip.conf; it does not stay in the image.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS needs
WORKDIR /needs
COPY constraints.txt pyproject.toml ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(\
*p['build-system']['requires'], *p['project']['dependencies'], *p['project']['optional-dependencies']['server'], \
sep='\n')" >requirements.txt && rm pyproject.toml

# What the project needs: gigabytes, of wheels alone, so without a compiler. A change of code does not come past here; the
# final image stands on this stage, as to copy it would take minutes.
FROM ${BASE} AS packages
ARG TORCH_INDEX=""
COPY --from=needs /needs /opt/needs
ENV PATH=/opt/venv/bin:$PATH
# (PyTorch's index lacks the pinned versions of what torch needs: that comes from the usual one.)
RUN --mount=type=secret,id=pip \
    export PIP_CONFIG_FILE=/run/secrets/pip PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 && \
    python3 -m venv /opt/venv && cd /opt/needs && \
    if [ -n "$TORCH_INDEX" ]; then \
        pip install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch torchvision; \
    fi && \
    pip install --constraint constraints.txt --requirement requirements.txt

# The project itself, as an addition to that environment.
FROM packages AS project
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --prefix /project .

FROM packages
# KubeRay's probes call wget. With a C compiler (and Python's headers, which the base has) Triton builds what launches the
# kernels of a compiled network. NCCL opens libibverbs and a card's driver (ibverbs-providers) as it starts; where they are
# missing it takes TCP between nodes, in silence. No file may give its caller another user's rights, and all but /tmp is
# root's.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends \
        ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 wget && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* && \
    groupadd --gid 1000 pipeline && \
    useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin pipeline && \
    find / -xdev -type f -perm /6000 -exec chmod a-s {} + && \
    find / -xdev -type d -perm -0002 ! -path /tmp -exec chmod o-w {} +
COPY --from=project /project /opt/venv
WORKDIR /app
COPY scripts/make_digits.py scripts/make_secrets.py scripts/mlflow_server.sh scripts/pre_stop.sh scripts/
COPY configs configs
# The root file system may be read-only; what is written goes to /tmp. Ray would kill a job 3 s after it was asked to
# stop, before it has saved a checkpoint; the head's own environment says otherwise. Of the driver NVIDIA's runtime brings
# compute and utility by itself; nvJPEG, which DALI decodes with, finds the card's JPEG unit through video (libnvcuvid).
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=600
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pipeline" \
      org.opencontainers.image.description="Exact, fault-tolerant training of image classifiers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
CMD ["pipeline", "--help"]
