# The images of every role, of the same sources. What is in them is said in one place, .ci/image/root.
#   docker build -t foregate .                        for processors
#   docker build --target cuda -t foregate:cuda .     for nodes with cards; also serves on processors
# Without Docker: .ci/image/build target/release/foregate NAME:TAG OUT.tar, which is what the tests do, and --cuda for cards.

# Rust, and what .ci/need finds missing. A mirror's name can be given: --build-arg RUST=…
ARG RUST=rust:1.95-bookworm
FROM ${RUST} AS base
WORKDIR /foregate
COPY .ci/need .ci/need
RUN .ci/need build && rm -rf /var/lib/apt/lists/*

FROM base AS build-cpu
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/foregate/target \
    cargo build --release --locked --bin foregate \
 && .ci/image/root target/release/foregate /image e2e/models/demo=/e2e/models/demo

# The compiler for cards and NCCL are fetched before the sources come, so that a change of those fetches nothing.
FROM base AS build-cuda
COPY .ci .ci
COPY kernels/cuda/toolkit kernels/cuda/toolkit
RUN .ci/need cuda && rm -rf /var/lib/apt/lists/*
RUN kernels/cuda/toolkit >/dev/null && .ci/nccl >/dev/null
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/foregate/target \
    CUDA_HOME="$(kernels/cuda/toolkit)" cargo build --release --locked --features cuda --bin foregate \
 && .ci/image/root target/release/foregate /image \
      e2e/models/demo=/e2e/models/demo "$(.ci/nccl)=/usr/local/lib/libnccl.so.2"

# The driver comes from the node: the container runtime mounts it into one of these folders.
FROM scratch AS cuda
COPY --from=build-cuda /image /
ENV PATH=/usr/local/bin
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
ENV LD_LIBRARY_PATH=/usr/local/lib:/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu:/usr/lib/aarch64-linux-gnu:/usr/lib64
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foregate"]

# The last one is what `docker build` makes when it is told nothing.
FROM scratch AS cpu
COPY --from=build-cpu /image /
ENV PATH=/usr/local/bin
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
WORKDIR /
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foregate"]
