# A node in a container: a small Debian with the program, run by a user without rights.
#
#     docker build -t doppler-node .
#     docker run -v doppler:/data -p 127.0.0.1:3677:3677 -e DOPPLER_API_KEY=secret \
#         doppler-node join --swarm lab --http 0.0.0.0:3677
#
# Models, keys and the log are in /data. compose.yaml starts three nodes.

FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN CARGO_TARGET_DIR=/target cargo build --release --locked --bin doppler-node \
    && sh packaging/tree.sh /target/release/doppler-node /tree \
    && strip /tree/bin/doppler-node

FROM debian:bookworm-slim
# libvulkan1 finds a GPU's driver, if the container is given one. curl asks /health.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl libvulkan1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin doppler \
    && install -d -o doppler -g doppler -m 0700 /data
COPY --from=build /tree /usr/local
# The model that comes with the repository, to try things with.
COPY models/tiny-mixtral-q4_k_m /usr/local/share/doppler-node/models/tiny-mixtral-q4_k_m
USER 10001
ENV DOPPLER_DATA=/data XDG_CACHE_HOME=/data/cache
VOLUME /data
# The APIs, and the swarm over TCP and QUIC.
EXPOSE 3677 4001/tcp 4001/udp
# While `serve` reads its model it answers 503: the start period allows for that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:3677/health"]
ENTRYPOINT ["doppler-node"]
CMD ["join", "--swarm", "lab", "--http", "127.0.0.1:3677"]
