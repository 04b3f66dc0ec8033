"""A process that holds a model and its kernels between the messages of a federation."""
