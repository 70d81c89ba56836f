# An exported detector at work, without torch, and nothing else: see docs/watch.md.
#   docker build -f docker/edge.Dockerfile -t blemish-edge .
#   docker run --read-only --user $(id -u) -v $PWD/model.onnx:/model.onnx:ro -v $PWD/in:/in:ro -v $PWD/out:/out blemish-edge
FROM python:3.13-slim
COPY pyproject.toml /tmp/pyproject.toml
RUN pip install --no-cache-dir --group /tmp/pyproject.toml:edge && rm /tmp/pyproject.toml
COPY src/blemish/edge /app/edge
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1
USER 65534
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "edge"]
CMD ["watch", "/model.onnx", "/in", "/out"]
