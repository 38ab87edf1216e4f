# scfm with all extras and the versions of requirements.lock, on CUDA 12.8:
#
#   docker build -t scfm .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" -e HF_TOKEN scfm train flux_dev_lora.yaml

FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-dev python3.12-venv gcc g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/scfm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The packages first: their layer stays when only the sources change.
COPY requirements.lock ./
RUN /opt/scfm/bin/python -m pip install --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY scfm_core scfm_core
COPY data_tools data_tools
COPY recipes recipes
COPY slurm slurm
RUN /opt/scfm/bin/python -m pip install --no-deps --no-build-isolation .

FROM nvidia/cuda:12.8.1-base-ubuntu24.04
# Compiler and headers: Triton compiles the launcher of each kernel when it first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-dev gcc g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-create-home --uid 10001 scfm \
    && install --directory --mode 1777 /work /cache
COPY --from=build /opt/scfm /opt/scfm
# `docker run --user` may give any number, which has no name and no home. So the home is a folder that everybody may write to, and
# USER is set, since libraries that ask for the user's name look there first.
ENV PATH=/opt/scfm/bin:$PATH HOME=/cache USER=scfm
USER 10001
WORKDIR /work
ENTRYPOINT ["scfm"]
CMD ["--help"]
