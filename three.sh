export CIFAR10_DIR=/tmp/d/cifar-10-batches-bin
export PATH=/tmp/venv/bin:$PATH
