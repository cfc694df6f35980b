import { fileURLToPath } from 'node:url';
import { demoEnvironment, runDemo, type DemoEvent, type DemoResult } from '../../demo/demo.js';
import { formatDuration } from '../../human.js';
import { styleFor, type Style } from '../../ui/style.js';
import type { DemoInput } from '../demo.js';
import type { CommandContext, Outcome } from '../spec.js';

/** The last line with `--json`; the lines before it are of the types chapter, command and output. */
export interface DemoAnswer extends DemoResult {
  readonly type: 'done';
}

const PROGRAM = fileURLToPath(new URL('../../../bin/b2', import.meta.url));

function eventText(event: DemoEvent, style: Style): string {
  switch (event.type) {
    case 'chapter':
      return `\n${style.bold(event.text)}`;
    case 'command':
      return style.cyan(`$ ${event.command}`);
    case 'output':
      return event.text;
  }
}

export async function run(context: CommandContext, input: DemoInput): Promise<Outcome<DemoAnswer>> {
  const { output, env, flags } = context;
  const style = await styleFor({ isTty: output.interactive, json: flags.json, env });
  const result = await runDemo({
    program: PROGRAM,
    env,
    keep: input.options.keep,
    disks: process.geteuid?.() === 0 ? ['loop', 'ext4', 'plain'] : ['ext4', 'plain'],
    clock: context.clock,
    random: context.random,
    signal: context.signal,
    show: (event) => {
      const text = eventText(event, style);
      if (text !== '' || flags.json) output.line(event, text);
    },
  });
  return { data: { type: 'done', ...result } };
}

export function text(data: DemoAnswer, style: Style): string {
  const lines = [
    '',
    `${style.green('done')} in ${formatDuration(data.elapsedSeconds)}: every byte of the disk was as on Tuesday, and all that the watch captured (${data.watch.source === 'trace' ? "by the kernel's block events" : 'by comparing'}) as on the disk`,
  ];
  if (data.kept) {
    const { shown } = demoEnvironment({}, data.dir);
    lines.push(`everything is in ${data.dir} (the disk as disk.img); to go on with it:`);
    lines.push(
      `export ${Object.entries(shown)
        .map(([name, value]) => `${name}=${value}`)
        .join(' ')}`,
    );
  } else {
    lines.push('disk, key and repository of the demo are removed');
  }
  return lines.join('\n');
}
