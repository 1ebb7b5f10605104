"""The store of keys and values of spans of tokens: on the device, in host memory, in a folder."""
