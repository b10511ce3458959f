"""Files on disk -> cached latents and text embeddings -> batches.

    scan      which files can be used, and why the others cannot
    video     decoding and writing video files
    buckets   picture sizes and frame counts
    store     the caches on disk
    encode    filling the caches
    prepare   all of the above, in order
    batches   which sample is where in which step

Encoders reach this room as callables, so it knows no model.
"""
