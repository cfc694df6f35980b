import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  volume: { label: 'VOLUME', description: 'name or id of the volume' },
} as const satisfies ArgumentSpecs;
const options = {
  at: {
    value: 'T',
    description: 'the newest exact point not after this time, a snapshot, or a point (#12)',
    default: 'latest',
  },
  socket: {
    value: 'PATH',
    description:
      'unix socket to make, readable by this user only; default: one in $XDG_RUNTIME_DIR or /tmp',
    complete: 'file',
  },
  listen: { value: 'HOST:PORT', description: 'serve on TCP instead, with TLS' },
  'tls-cert': {
    value: 'FILE',
    description: 'certificate of the server, PEM; clients must use TLS then',
    complete: 'file',
  },
  'tls-key': { value: 'FILE', description: 'key of the certificate, PEM', complete: 'file' },
  'tls-client-ca': {
    value: 'FILE',
    description: 'only clients with a certificate of this authority (PEM) are served',
    complete: 'file',
  },
  plaintext: {
    description: 'serve clients without TLS on TCP: whoever reaches the port reads the disk',
  },
  writable: { description: 'accept writes and throw them away at the end' },
  overlay: {
    value: 'FILE',
    description:
      'accept writes and keep them in this file, which is made if need be; the repository never changes',
    complete: 'file',
  },
} as const satisfies OptionSpecs;
export type ServeNbdInput = Input<typeof args, typeof options>;

export const serveNbdCommand = defineCommand({
  name: 'serve nbd',
  summary: 'serve a point of a volume as a network block device',
  description: [
    'Serves the image of a volume at a point over the NBD protocol until it is stopped: for qemu, nbdcopy, nbd-client and everything else that speaks it. Nothing is copied first, and nothing in the repository changes.',
    'With --overlay the export is writable and the writes go to a file: a virtual machine can boot from the repository at once. The file belongs to that one point; served again with the same file, clients find everything that was flushed, also after a crash.',
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 serve nbd web1/sda --socket /run/web1.sock',
      text: 'The newest point, read-only.',
    },
    {
      command: 'b2 serve nbd web1/sda --at "10m ago" --overlay /var/tmp/web1.overlay',
      text: 'As it was ten minutes ago, writable.',
    },
    {
      command:
        'b2 serve nbd web1/sda --listen 0.0.0.0:10809 --tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem',
      text: 'On the network, for clients with a certificate.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]: 'no such volume or point',
    [ExitCode.damage]: 'the history or the overlay is damaged',
    [ExitCode.noRepository]: 'no repository there',
    [ExitCode.leaseHeld]: 'another process has the overlay open',
  },
  load: () => import('./run/serve-nbd.js'),
});
