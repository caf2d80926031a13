# The image of every role, for processors. `docker build -t foregate .`
# Without Docker: .ci/image/build target/release/foregate NAME:TAG OUT.tar, which is what the tests do.
FROM docker.io/library/rust:1.95-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /foregate
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/foregate/target \
    cargo build --release --locked --bin foregate \
 && strip --strip-unneeded -o /usr/local/bin/foregate target/release/foregate

# C library, its loader, certificates, a user 65532. No shell.
FROM gcr.io/distroless/cc-debian12:nonroot AS cpu
COPY --from=build /usr/local/bin/foregate /usr/local/bin/foregate
# The demonstration model, where charts/examples/tiny.yaml looks for it.
COPY e2e/models/demo /e2e/models/demo
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foregate"]
