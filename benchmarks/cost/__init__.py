"""What the library costs in time and memory."""
