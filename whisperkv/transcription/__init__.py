"""Recordings to text: reading, windows of speech, decoding in batches, segments and words, and the files of them."""
