import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  mountpoint: {
    label: 'MOUNTPOINT',
    description: 'where "b2 mount" mounted',
    complete: 'directory',
  },
} as const satisfies ArgumentSpecs;
const options = {
  lazy: { description: 'also while it is in use: it goes away when the last user has left' },
} as const satisfies OptionSpecs;
export type UmountInput = Input<typeof args, typeof options>;

export const umountCommand = defineCommand({
  name: 'umount',
  summary: 'end a mount',
  description: ['Unmounts what "b2 mount" mounted; the process that served it ends by itself.'],
  arguments: args,
  options,
  examples: [{ command: 'b2 umount /mnt', text: 'Ends the mount.' }],
  exitCodes: { [ExitCode.notFound]: 'nothing is mounted there' },
  load: () => import('./run/umount.js'),
});
