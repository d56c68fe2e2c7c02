"""Content-addressed blobs: a hash tree over labelled parts, kept on disk or in memory, fetched from many peers."""
