"""Option defaults, generated from every driver.toml by `madrigal-dev defaults`; a test compares."""

OPTIONS: dict[str, dict[str, str]] = {"datastore/fs": {"SUPPORTED_FS": "ext2,ext3,ext4,xfs"}}
USER: frozenset[str] = frozenset()
