# How hpcprune is reached on this cluster: every job sources this file, on the first of its nodes. Edit it to fit.
# Paths are relative to the folder from which the job was submitted.

# A virtual environment on a disk that all nodes see (the clone's own, as `make demo` makes it):
source .venv/bin/activate

# Modules, in place of it or before it:
#   module purge; module load gcc openmpi python
#
# A container, in place of it; the ranks are started inside it, --nv brings the GPUs in:
#   hpcprune=(apptainer exec --nv "$HOME/hpcprune.sif" hpcprune)
#
# What your network needs:
#   export OMPI_MCA_btl_tcp_if_include=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
