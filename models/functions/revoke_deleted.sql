-- anynode_revoke_deleted: refuse the tokens of a user who is deleted.
--
-- Does: writes a revocation with the time of the deletion, by a node, by a command or by hand, so that no old token
-- makes the user again. What stays is the hash of the user's id.
-- Locks: the row in `revocations`, for as long as the transaction of the deletion lasts.
-- Repeating: the later time counts.
-- Called by: the trigger below, for each row that is deleted.

CREATE OR REPLACE FUNCTION anynode_revoke_deleted()
RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO revocations AS r (user_hash, not_before)
    VALUES (encode(sha256(convert_to(old.id, 'UTF8')), 'hex'),
            extract(epoch FROM clock_timestamp())::double precision)
    ON CONFLICT (user_hash) DO UPDATE
        SET not_before = greatest(r.not_before, excluded.not_before), changed_xid = excluded.changed_xid;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER users_revoke_deleted AFTER DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION anynode_revoke_deleted();
