import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  keep: {
    value: 'DIR',
    description: 'make everything in DIR, a new or empty directory, and leave it there',
    complete: 'directory',
  },
} as const satisfies OptionSpecs;
export type DemoInput = Input<typeof args, typeof options>;

export const demoCommand = defineCommand({
  name: 'demo',
  summary: 'show backups, an accident, a rollback and a watch on a scratch disk',
  description: [
    'Makes a small disk with files on it and a repository in a temporary directory, captures the disk, destroys files, brings them back by writing only what differs, watches the disk while it is written to, and verifies the repository. Every command is shown as one would type it, with what it said. It takes a few seconds and removes everything it made.',
    "The disk is a loop device with ext4 for root, watched by the kernel's block events where it has them; else an image file, which is compared. No configuration is read and no other repository is touched.",
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 demo', text: 'Shows what b2 does.' },
    {
      command: 'b2 demo --keep /tmp/b2-demo',
      text: 'Leaves disk, key and repository there, to try commands on.',
    },
  ],
  load: () => import('./run/demo.js'),
});
