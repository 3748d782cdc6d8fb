"""`python -m demo`: fine-tune a small model for two tasks, merge the two, measure all of them.

Read in this order: `texts` (the two tasks), `encoder` (from a folder to an accuracy), `finetune`
(the models that get merged), `table` (what is printed), `__main__` (the story).
"""
