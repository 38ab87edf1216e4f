# scfm with all extras and the versions of requirements.lock, on CUDA 12.8:
#
#   docker build -t scfm .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" -e HF_TOKEN scfm train flux_dev_lora.yaml

# Rocky Linux, because its packages have the Python of requirements.lock.
FROM nvidia/cuda:12.8.1-base-rockylinux9 AS build
# hadolint ignore=DL3041
RUN dnf install -y python3.11-devel gcc gcc-c++ && dnf clean all
RUN python3.11 -m venv /opt/scfm
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

FROM nvidia/cuda:12.8.1-base-rockylinux9
# Compiler and headers: Triton compiles the launcher of each kernel when it first runs.
# hadolint ignore=DL3041
RUN dnf install -y python3.11-devel gcc gcc-c++ && dnf clean all && mkdir -m 1777 /work /cache
COPY --from=build /opt/scfm /opt/scfm
# The user is a number without a name and a home, here and with `docker run --user`. So the home is a folder that everybody may
# write to, and USER is set, since libraries that ask for the user's name look there first.
ENV PATH=/opt/scfm/bin:$PATH HOME=/cache USER=scfm
USER 10001
WORKDIR /work
ENTRYPOINT ["scfm"]
CMD ["--help"]
