"""Where samples come from: a folder, a table of URLs or paths, a bucket, the Hugging Face Hub.

Every source ends as local files: what lies elsewhere is copied once into the dataset's `download_dir`, so that the rest
of the room decodes, hashes and caches files and nothing else, and a later start needs no network.
"""
