"""The two programs of section 4 of the article "BN 层架构设计原理与实践", as they stand there and ported to Flax and Optax.

`keras_original` and `torch_original` are the article's programs layer for layer, `keras_port` and `torch_port` are what
becomes of them here, and `keras_program` and `torch_program` train each original beside its port. docs/article.md goes
through the whole article.
"""
