# docker build --tag countermark .
# docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" countermark \
#     protect digits --out mine
#
# Every version is as in constraints.txt. For the smaller CPU build of PyTorch give the index that
# has it: --build-arg TORCH="torch==VERSION+cpu --extra-index-url URL". What you name is read and
# written in /work, and fetched data stay in /work/.countermark. A .pt2 suspect is refused where
# the container may not create user namespaces, which is the default of Docker. hadolint 2.15.1 has
# nothing to say about this file.
FROM python:3.11-slim

ENV PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    COUNTERMARK_CACHE=/work/.countermark

ARG TORCH=torch
WORKDIR /build
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH}
COPY pyproject.toml LICENSE README.md ./
COPY src src
RUN pip install --constraint constraints.txt ".[digits,parquet,onnx,serve,judge,sign,study]" \
    && rm -rf /build/*

RUN useradd --uid 10001 --create-home countermark && install --directory --owner=10001 /work
USER 10001
WORKDIR /work
ENTRYPOINT ["countermark"]
