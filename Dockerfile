# secateur on the CPU (linux/amd64 and linux/arm64, so Apple silicon runs it natively).
#   docker build -t secateur .
#   docker run --rm -v secateur-runs:/work/runs secateur run recipes/quickstart.yaml
# Data and runs in folders of the host; the second option makes the files yours:
#   docker run --rm --user "$(id -u)" -v "$PWD/runs:/work/runs" -v "$PWD/data:/data:ro" secateur \
#     run recipes/s3_fashion_mnist.yaml data.root=/data

FROM python:3.12-slim-bookworm AS build
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# torch without CUDA: a tenth of the size
RUN uv venv /opt/secateur \
    && uv pip install --no-cache --compile-bytecode --python /opt/secateur/bin/python --torch-backend=cpu ".[data,track]"

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 10001 secateur \
    && install --directory --owner=secateur /work /work/runs /data
COPY --from=build /opt/secateur /opt/secateur
COPY recipes /work/recipes
ENV PATH=/opt/secateur/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
VOLUME ["/work/runs", "/data"]
ENTRYPOINT ["secateur"]
CMD ["--help"]
