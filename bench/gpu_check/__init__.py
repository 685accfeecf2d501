"""``python -m bench.gpu_check``: what a rented GPU can show in eight minutes, the most important first.

``stages.py`` has the order, ``__main__.py`` the budget. Each other file is a stage or a part of one.
"""
