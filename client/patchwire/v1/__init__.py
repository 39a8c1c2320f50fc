"""The generated message classes of the protocol, version 1.

One module per file of `protos/patchwire/v1/`, made from it when the package is built or installed. Nothing here is
written by hand: change a proto file and install again. The words of the messages are explained in the proto files.
"""
