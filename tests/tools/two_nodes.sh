#!/usr/bin/env bash
# Runs main_act.py on two simulated nodes: two namespaces of this machine, connected by a virtual network.
#
#   sudo tests/tools/two_nodes.sh --data-set DIGITS --model avit_micro_patch4_32 --input-size 32 --output_dir OUT
#
# The torchrun commands are those of two real machines, except for --rdzv_conf, --local-addr and GLOO_SOCKET_IFNAME,
# which real machines detect themselves. Requires root and iproute2. PYTHON names the interpreter.
set -euo pipefail
here=$(dirname "$0")
network=10.77.$((RANDOM % 250))
names=("avit-$$-0" "avit-$$-1")

clean_up() {
  kill $(jobs -p) 2>/dev/null || true
  for name in "${names[@]}"; do ip netns delete "$name" 2>/dev/null || true; done
}
trap clean_up EXIT

for node in 0 1; do
  ip netns add "${names[node]}"
  ip -n "${names[node]}" link set lo up
done
ip link add node0 netns "${names[0]}" type veth peer name node0 netns "${names[1]}"
for node in 0 1; do
  ip -n "${names[node]}" address add "$network.$((node + 1))/24" dev node0
  ip -n "${names[node]}" link set node0 up
done

on_node() {
  local node=$1
  shift
  GLOO_SOCKET_IFNAME=node0 ip netns exec "${names[node]}" "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id="$$" --rdzv_endpoint="$network.1:29500" \
    --rdzv_conf="is_host=$((1 - node))" --local-addr="$network.$((node + 1))" "$here/../../main_act.py" "$@"
}

on_node 1 "$@" &
on_node 0 "$@"
wait $!
