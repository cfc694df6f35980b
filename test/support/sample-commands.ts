/** A command tree with every kind of argument and option, for tests of parser, completions and man pages. */
import { parseSize } from '../../src/human.js';
import {
  defineCommand,
  type ArgumentSpecs,
  type CommandSpec,
  type CommandContext,
  type Input,
  type OptionSpecs,
  type Outcome,
} from '../../src/commands/spec.js';

const restoreArguments = {
  volume: { label: 'VOLUME', description: "which volume; it's a name" },
  target: { label: 'TARGET', description: 'where to: a device [or file]', complete: 'device' },
} as const satisfies ArgumentSpecs;
const restoreOptions = {
  at: { value: 'TIME', description: 'which point: newest not after TIME', default: 'latest' },
  format: { value: 'KIND', description: 'image format', choices: ['raw', 'qcow2'], default: 'raw' },
  'chunk-size': { value: 'SIZE', description: 'bytes of a chunk', parse: parseSize },
  tag: { value: 'T', short: 't', description: 'a tag', many: true },
  into: { value: 'DIR', description: 'a directory', complete: 'directory' },
  force: { short: 'f', description: 'overwrite' },
  'no-verify': { description: 'do not read back' },
} as const satisfies OptionSpecs;
export type SampleInput = Input<typeof restoreArguments, typeof restoreOptions>;

export type SampleRun = (context: CommandContext, input: SampleInput) => Promise<Outcome<unknown>>;

/** `restore` calls `run`; the others answer with their name. */
export function sampleCommands(run: SampleRun): readonly CommandSpec[] {
  const named = (name: string, summary: string): CommandSpec =>
    defineCommand({
      name,
      summary,
      description: [`${summary}.`],
      arguments: {
        device: { label: 'DEVICE', description: 'a device', many: true, complete: 'file' },
      },
      options: {},
      examples: [],
      load: () =>
        Promise.resolve({
          run: (_context: CommandContext, input: { arguments: { device: readonly string[] } }) =>
            Promise.resolve({ data: { name, device: input.arguments.device } }),
          text: (data: { name: string }) => data.name,
        }),
    });
  return [
    defineCommand({
      name: 'restore',
      summary: 'bring a volume back',
      description: ['Brings it back.', '.dot first: \\ and - and "quotes".'],
      arguments: restoreArguments,
      options: restoreOptions,
      examples: [
        { command: 'b2 restore web1/sda /dev/sdb --at "5m ago"', text: 'as five minutes ago' },
      ],
      exitCodes: { 4: 'no such point' },
      load: () => Promise.resolve({ run, text: (data: unknown) => `answer ${String(data)}` }),
    }),
    named('key add', 'add a key'),
    named('key list', 'list keys'),
    named('watch', 'capture on and on'),
  ];
}
