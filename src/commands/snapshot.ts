import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  device: {
    label: 'DEVICE',
    description:
      'a block device, partition or image file; or the name of a volume, for the device it was captured from',
    complete: 'device',
  },
} as const satisfies ArgumentSpecs;
const options = {
  name: { value: 'NAME', description: 'name of the snapshot; default: the time at which it began' },
  tag: { value: 'TAG', description: 'a tag to find it by', many: true },
  volume: { value: 'VOLUME', description: 'name of the volume; default: HOST/DEVICE' },
  class: {
    value: 'CLASS',
    description:
      'of a watched device, the least that will do: crash (nothing is frozen), fs (file systems are frozen), app (hooks are run); default: the best that can be had',
    choices: ['crash', 'fs', 'app'],
  },
  'skip-unreadable': {
    description: 'go on where the device cannot be read; the point is not exact then (exit code 3)',
  },
  'take-over': { description: 'write to a volume that another host has written; that host stops' },
} as const satisfies OptionSpecs;
export type SnapshotInput = Input<typeof args, typeof options>;

export const snapshotCommand = defineCommand({
  name: 'snapshot',
  summary: 'capture a device now, as a named point',
  description: [
    'If a running "b2 watch" captures the device to the same repository, it is asked for a point at this very moment, which is exact whatever writes to the device: of class app with hooks configured, else fs if its file systems can be frozen within the limit, else crash. The snapshot of a device of a group (watch.devices) names the point of that instant of each of its devices, because they carry one file system or volume group. If parts of a watched device cannot be read, the point is of class fuzzy and the exit code is 3. Any other device is captured now, as follows.',
    'Reads the whole device or image file and stores what the repository does not hold yet. Holes and zeros cost nothing; blocks that have not changed since the last point, or that any volume of any host has stored before, are not stored again.',
    'The point is exact (class crash) only if it is certain that nothing was written to the device meanwhile: b2 compares the write counters of the kernel, or the times of an image file, before and after. Otherwise the point is of class fuzzy, it is used only when it is named, and the exit code is 3. Unmount the file system, stop the virtual machine, or take an LVM snapshot and capture that.',
    'A snapshot is pinned: thinning never removes it.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 snapshot /dev/sdb', text: 'Captures the disk to volume HOST/sdb.' },
    {
      command: 'b2 snapshot /srv/vm/web.img --name before-upgrade --tag web',
      text: 'An image file, with a name.',
    },
    {
      command: 'b2 snapshot /dev/vg/root-snap --volume web1/root',
      text: 'An LVM snapshot, to the volume of its origin.',
    },
  ],
  exitCodes: {
    [ExitCode.partial]:
      'the point is not exact, parts of the device could not be read, or another device of its group has no point of that instant',
    [ExitCode.notFound]: 'no such device or volume',
    [ExitCode.noRepository]: 'no repository there',
    [ExitCode.leaseHeld]: 'another process has taken over the volume',
  },
  load: () => import('./run/snapshot.js'),
});
