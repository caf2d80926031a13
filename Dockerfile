# The image of every role, for processors. What is in it is said in one place, .ci/image/root.
#   docker build -t foregate .
# Without Docker: .ci/image/build target/release/foregate NAME:TAG OUT.tar, which is what the tests do.

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

FROM scratch AS cpu
COPY --from=build-cpu /image /
ENV PATH=/usr/local/bin
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
WORKDIR /
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foregate"]
