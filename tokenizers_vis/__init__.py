"""Visual tokenizers: images and clips to tokens and back. Imports nothing else of ours."""
