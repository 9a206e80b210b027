# effcli on a CPU: docker build -t effcli . && docker run --rm -v "$PWD:/work" effcli --help
# scripts/dockerfile.py carries out the COPY and RUN steps without an engine; CI runs it.
FROM python:3.11-slim AS build
COPY . /source
RUN pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
COPY --from=build /wheels /wheels
# torch by itself first: this index has builds without CUDA, which are several gigabytes smaller.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "$(ls /wheels/effcli-*.whl)[onnx,datasets]"
# The samples are in the wheel: what is installed can read them.
RUN effcli inspect sample:lm && effcli inspect sample:cnn
WORKDIR /work
ENTRYPOINT ["effcli"]
