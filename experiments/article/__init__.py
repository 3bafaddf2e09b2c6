"""The two programs of the article "BN 层架构设计原理与实践", section 4: as they stand there, and in Flax and Optax.

`keras_original` and `torch_original` are those programs layer for layer, `keras_port` and `torch_port` their ports;
`keras_program` and `torch_program` train each original beside its port. docs/article.md goes through the whole article.
"""
