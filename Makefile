# Each target does its own set-up and says what it does. A broker is taken from scripts/rabbitmq.
.PHONY: help demo test soak bench lint check-deploy compose-test fmt clean

help:
	@echo 'make demo   an order process on a real RabbitMQ, with kills; half a minute after the build (STORE=postgres: with an order ledger)'
	@echo 'make test   unit, property, conformance and end-to-end tests (BROKER=3.10|4.0|4.3, STORE=sqlite|postgres)'
	@echo 'make soak   the tests that give confidence by their length, as long as they can be: half an hour, target/soak.txt'
	@echo 'make bench  Warren beside loops by hand and other makes: a table, target/bench.json (ARGS=--smoke: a minute)'
	@echo 'make lint   format, clippy, licences and sources of crates, docs'
	@echo 'make check-deploy   manifests, alerts, dashboard, Dockerfile and Compose file, without a cluster'
	@echo 'make compose-test   the Compose stack on a container engine started for it: scaled and broken under load'
	@echo 'make fmt    format the code'
	@echo 'make clean  stop the private brokers, remove target/'

demo:
	@scripts/demo

test:
	@scripts/test

soak:
	@scripts/soak

bench:
	@scripts/bench $(ARGS)

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --profile testing --locked -- -D warnings
	cargo clippy -p warren-worker --profile testing --locked -- -D warnings
	scripts/deny
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --profile testing --locked --quiet

check-deploy:
	@scripts/check-deploy

compose-test:
	@scripts/compose-test

fmt:
	cargo fmt --all

clean:
	-scripts/rabbitmq stop
	-scripts/postgres stop
	cargo clean
