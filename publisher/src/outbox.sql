CREATE TABLE {table} (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- the order in which rows are published
    event_id     text NOT NULL DEFAULT gen_random_uuid()::text,   -- source and event_id together are the event's identity
    source       text NOT NULL,
    type         text NOT NULL,                                   -- also the routing key
    key          text,                                            -- order is kept per key; without it per subject
    lane         text,
    subject      text,
    time         timestamptz NOT NULL DEFAULT now(),
    content_type text DEFAULT 'application/json',
    data         json,                                            -- JSON; it is published as it was written
    data_bytes   bytea,                                           -- or anything else
    traceparent  text,
    extensions   jsonb,                                           -- more attributes: {"sequence": "7", "priority": 8}
    created_at   timestamptz NOT NULL DEFAULT now(),
    sent_at      timestamptz,                                     -- when the broker had confirmed it
    error        text,                                            -- why it cannot be published; NULL tries again
    CHECK (data IS NULL OR data_bytes IS NULL)
);
CREATE INDEX {unsent} ON {table} (id) WHERE sent_at IS NULL AND error IS NULL;
CREATE INDEX {sent} ON {table} (sent_at) WHERE sent_at IS NOT NULL;
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_notify('{channel}', ''); RETURN NULL; END $$;
CREATE TRIGGER {trigger} AFTER INSERT OR UPDATE OF error ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {function}();
