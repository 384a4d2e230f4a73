"""Option defaults, generated from every driver.toml by `make generated`; a test compares."""

# By kind and not by driver: a driver may have been linked or copied under another name.
OPTIONS: dict[str, dict[str, str]] = {
    "datastore": {
        "CONVERT": "yes",
        "NFS_AUTO_ENABLE": "no",
        "NFS_AUTO_OPTS": "defaults",
        "PRIVATE_REDIRECTS": "no",
        "SPARSE": "yes",
        "SUPPORTED_FS": "ext2,ext3,ext4,xfs",
        "TLS_VERIFY": "yes",
        "UMASK": "0007",
    },
    "tm": {},
}
USER: frozenset[str] = frozenset()
