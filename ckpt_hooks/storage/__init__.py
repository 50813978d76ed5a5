"""Bytes on a disk: the OCDBT index, the parallel writer and reader, checksums, and the durable commit."""
