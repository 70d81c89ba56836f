# Every command of blemish, with torch and its CUDA libraries: see docs/watch.md.
#   docker build -f docker/train.Dockerfile -t blemish .
#   docker run --gpus all --shm-size 2g --user $(id -u) -v $PWD:/work blemish train model=padim data=folder data.root=parts
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip install --no-cache-dir --group /source/pyproject.toml:wheel && python -m build --wheel --no-isolation --outdir /dist /source

FROM python:3.12-slim
COPY --from=wheel /dist /dist
# hadolint ignore=DL3013
RUN wheel=$(echo /dist/*.whl) && pip install --no-cache-dir "${wheel}[export,watch]"
WORKDIR /work
ENV HOME=/tmp
USER 65534
ENTRYPOINT ["blemish"]
CMD ["--help"]
