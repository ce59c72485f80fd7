"""ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky, Sutskever, Hinton 2012), reproduced."""

__version__ = "0.1.0"
