# Warren's images. `worker` and `publisher` hold one static program each and nothing else; `order` is the worker of examples/order,
# with the Perl that its handler takes; `shop` holds the example's services in Python.
#
#   docker build --target worker -t warren-worker .
#
# A handler that is a program (`exec:`) needs its language beside the worker: start from an image that has it, and
# `COPY --from=warren-worker /usr/local/bin/warren-worker /usr/local/bin/`.
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim
ARG PYTHON_IMAGE=python:3-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
# What Cargo reads, and no more: a change elsewhere builds nothing again.
COPY Cargo.toml Cargo.lock ./
COPY shared shared
COPY publisher publisher
COPY worker worker
COPY tests tests
COPY bench bench
COPY examples/order/Cargo.toml examples/order/
COPY examples/order/src examples/order/src
# Static, so that the images need no system below. Without debug information, but with the names of functions: a backtrace can be read.
ENV RUSTFLAGS='-C target-feature=+crt-static' CARGO_PROFILE_RELEASE_STRIP=debuginfo CARGO_PROFILE_RELEASE_DEBUG=none
# Cargo compares times, and the cache may be newer than an older state of the sources: they count as changed. With --target the
# flags are not meant for build scripts and macros, which cannot be static.
RUN --mount=type=cache,id=warren-cargo,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=warren-target,target=/src/target,sharing=locked \
    find shared publisher worker examples -type f -exec touch {} + \
 && host=$(rustc --print host-tuple) \
 && cargo build --release --locked --target "$host" -p warren-worker -p warren-publisher -p warren-order \
 && mkdir -p /out/bin /out/data \
 && for program in worker publisher order; do cp "target/$host/release/warren-$program" /out/bin/ || exit 1; done
COPY examples/order/order.yaml examples/order/
# The example on a network of containers: the payment service is another host, the handler's program lies in the image.
RUN sed -e 's|http://127.0.0.1:8090/|http://payments:8090/|' -e 's|examples/order/stock.pl|/opt/order/stock.pl|' \
      examples/order/order.yaml >/out/order.yaml \
 && grep -q 'http://payments:8090/' /out/order.yaml && grep -q '/opt/order/stock.pl' /out/order.yaml

FROM scratch AS worker
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="warren-worker" \
      org.opencontainers.image.description="A worker fleet for RabbitMQ: the worker" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# For handlers over https and for brokers and databases whose certificates a public authority signed.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# Where SQLite's file goes when nothing else is said; a volume that is mounted here takes over the owner.
COPY --from=build --chown=65532:65532 /out/data /var/lib/warren
COPY --from=build /out/bin/warren-worker /usr/local/bin/warren-worker
WORKDIR /var/lib/warren
ENV WARREN_ADMIN_ADDR=0.0.0.0:9090
USER 65532:65532
EXPOSE 9090
STOPSIGNAL SIGTERM
# As PID 1 the worker reaps (docs/operations.md): no init is needed, also where handlers are programs.
# The process itself, not the broker: what restarts unhealthy containers must not restart the fleet when the broker is away.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/usr/local/bin/warren-worker", "healthcheck", "livez"]
ENTRYPOINT ["/usr/local/bin/warren-worker"]
CMD ["run"]

FROM scratch AS publisher
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="warren-publisher" \
      org.opencontainers.image.description="A worker fleet for RabbitMQ: the publisher and the relay" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/bin/warren-publisher /usr/local/bin/warren-publisher
USER 65532:65532
STOPSIGNAL SIGTERM
# No HEALTHCHECK: it says itself when it stalls, and ends when its input does. (`HEALTHCHECK NONE` makes `compose up --wait` fail.)
ENTRYPOINT ["/usr/local/bin/warren-publisher"]
CMD ["--help"]

FROM ${RUNTIME_IMAGE} AS order
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="warren-order" \
      org.opencontainers.image.description="A worker fleet for RabbitMQ: the worker of the example's order process" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The slim image's Perl has no JSON; an image that brings its own Perl is left as it is.
# hadolint ignore=DL3008
RUN perl -MJSON::PP -e 1 2>/dev/null \
 || { apt-get update && apt-get install -y --no-install-recommends perl && rm -rf /var/lib/apt/lists/*; }
COPY --from=build --chown=65532:65532 /out/data /var/lib/warren
COPY --from=build --chown=65532:65532 /out/data /var/lib/order
COPY --from=build /out/bin/warren-order /usr/local/bin/warren-order
COPY --from=build /out/order.yaml /etc/warren/order.yaml
COPY examples/order/stock.pl /opt/order/stock.pl
WORKDIR /var/lib/warren
ENV WARREN_ADMIN_ADDR=0.0.0.0:9090 WARREN_CONFIG=/etc/warren/order.yaml ORDER_DIR=/var/lib/order
USER 65532:65532
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/usr/local/bin/warren-order", "healthcheck", "livez"]
ENTRYPOINT ["/usr/local/bin/warren-order"]
CMD ["run"]

FROM ${PYTHON_IMAGE} AS shop
LABEL org.opencontainers.image.title="warren-shop" \
      org.opencontainers.image.description="A worker fleet for RabbitMQ: the example's payment service, and its customers" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY --from=build --chown=65532:65532 /out/data /var/lib/order
COPY examples/order/payments.py deploy/shop/orders.py /opt/order/
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8090
# Python hears SIGINT everywhere; as the first process of a container it would ignore SIGTERM.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s --timeout=5s --start-period=15s \
  CMD ["python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 8090), 2)"]
ENTRYPOINT ["python3"]
CMD ["/opt/order/payments.py", "8090", "/var/lib/order", "0.0.0.0"]
