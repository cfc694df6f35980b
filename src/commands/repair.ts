import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  volume: {
    label: 'VOLUME',
    description: 'name or id of a volume whose manifest to look at; default all',
    optional: true,
    many: true,
  },
} as const satisfies ArgumentSpecs;
const options = {
  'dry-run': { description: 'only say what would be done' },
  'no-data': { description: 'do not read the stored data to find damaged frames' },
} as const satisfies OptionSpecs;
export type RepairInput = Input<typeof args, typeof options>;

export const repairCommand = defineCommand({
  name: 'repair',
  summary: 'make anew what can be derived, and set damaged frames aside',
  description: [
    'Rebuilds from the packs alone whatever is damaged or missing of the manifest, the journal, the claims and the names of volumes, also when all of that is gone; writes "config" anew from its copy or the other way round; and writes damaged headers and footers of packs anew.',
    'Damaged frames are set aside, so that nothing new uses them: the next capture stores again what the device still has. Points that need them stay listed, and restoring them says "damaged": data is never invented, and none is deleted.',
    'If commits are lost for good, the points before them stay whole. What comes after them is kept and named; the volume gets a new start, and the next capture stores the whole device.',
    'A second run finds nothing more to do. Run "b2 verify" first: if a copy of a damaged file exists somewhere, putting it back loses less.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 repair --dry-run', text: 'What would be done.' },
    { command: 'b2 repair', text: 'Do it.' },
  ],
  exitCodes: {
    [ExitCode.partial]: 'some things are left that cannot be mended',
    [ExitCode.leaseHeld]: 'another repair or prune is running',
  },
  load: () => import('./run/repair.js'),
});
