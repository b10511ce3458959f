"""Files on disk -> cached latents and text embeddings -> batches.

    sources   where files come from: folders, tables, buckets, the Hub
    scan      which files can be used, and why the others cannot (findings)
    captions  the captions of a file
    video     decoding and writing video files (pictures, hdr)
    buckets   picture sizes and frame counts
    store     the caches on disk
    encode    filling the caches
    prepare   all of the above, in order
    plan      which buckets take part in an epoch, and which are too small
    batches   which sample is where in which step

Encoders reach this room as callables, so it knows no model.
"""
