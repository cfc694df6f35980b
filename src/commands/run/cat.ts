import { B2Error } from '../../errors.js';
import type { Style } from '../../ui/style.js';
import type { CatInput } from '../cat.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withFiles } from './files-session.js';

export function run(context: CommandContext, input: CatInput): Promise<Outcome<undefined>> {
  const { place: text } = input.arguments;
  return withFiles(context, text, input.options, async ({ access, path }) => {
    const place = await access.place(path ?? '');
    if (path === undefined || place === undefined) {
      throw new B2Error('usage', `"${text}" names no file`, {
        hint: 'b2 cat VOLUME:PATH; "b2 ls VOLUME" lists the file systems.',
      });
    }
    for await (const bytes of access.read(place)) await context.output.bytes(bytes);
    return { data: undefined };
  });
}

/** The bytes were all. */
export function text(_data: undefined, _style: Style): string {
  return '';
}
