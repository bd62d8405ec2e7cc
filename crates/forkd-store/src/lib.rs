//! Snapshot directories and content-addressed blobs on disk: published whole, verified, swept.
