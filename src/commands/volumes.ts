import { defineCommand, type Input } from './spec.js';

const args = {} as const;
const options = {} as const;
export type VolumesInput = Input<typeof args, typeof options>;

export const volumesCommand = defineCommand({
  name: 'volumes',
  summary: 'list the volumes of the repository',
  description: [
    'A volume is the recorded history of one block device or image. Shown are its name, size, number of recovery points, and the newest exact point.',
  ],
  arguments: args,
  options,
  examples: [{ command: 'b2 volumes', text: 'Every volume of every host.' }],
  load: () => import('./run/volumes.js'),
});
