"""DEVICE, HOST and NVME behind one interface: what rests there, and what waits there between two passes."""
