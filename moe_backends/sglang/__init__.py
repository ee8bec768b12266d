"""The SGLang plugin: all code that SGLang calls, and all that depends on SGLang's internals."""
