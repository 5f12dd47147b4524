#!/bin/sh
# Runs once, when the volume is new: the user that the workers are, a database that is theirs, and the example's own table, into
# which the shipping handler writes inside the store's transaction. The password is read by psql and is no argument of anything.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\set password `cat /run/secrets/postgres-warren`
CREATE ROLE warren LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'password';
CREATE DATABASE warren OWNER warren;
REVOKE ALL ON DATABASE warren FROM PUBLIC;
\connect warren
SET ROLE warren;
CREATE TABLE parcels (instance text NOT NULL, address text NOT NULL);
SQL
