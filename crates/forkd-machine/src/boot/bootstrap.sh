#!/bin/sh
# The only part of forkd that lies on the machine's root disk: finds the configuration that the host
# shares afresh at every start, and hands over to the script in it.
mkdir -p /run/forkd/config
mount -t 9p -o trans=virtio,version=9p2000.L,ro forkd-config /run/forkd/config || {
    echo "forkd-machine: the host's configuration cannot be mounted"
    exit 1
}
exec /bin/sh /run/forkd/config/boot.sh
