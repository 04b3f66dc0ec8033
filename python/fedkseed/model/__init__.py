"""A model as its parameters: their order, their identity, a copy to work on."""
