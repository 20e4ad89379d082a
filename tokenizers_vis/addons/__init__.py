"""What any tokenizer can be trained with: token dropout, a prior, a teacher, an adversary.

`base` is the interface; `training.TokenizerTraining` puts a tokenizer and its add-ons together.
"""
